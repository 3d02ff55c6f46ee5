"""Recipes that make and distil models: objectives, data, and one trainer."""
