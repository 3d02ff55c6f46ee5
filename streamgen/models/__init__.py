"""Networks: the causal Wan transformer, and the codec and text encoder of the embedded model."""
