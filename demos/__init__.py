"""Small programs that show what a session can do."""
