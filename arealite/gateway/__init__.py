"""Sessions of agents: each prompt extends the tokens that were sampled before, and a session is one trajectory."""
