"""The engine of the built-in server: sequences, the KV cache, the served model, weights that come in. No HTTP here."""
