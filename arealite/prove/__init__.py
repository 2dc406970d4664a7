"""`arealite prove`: a training step does not depend on how it is computed, shown on the user's own configuration."""
