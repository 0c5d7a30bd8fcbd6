"""The model: weight table, audio tower, decoder."""
