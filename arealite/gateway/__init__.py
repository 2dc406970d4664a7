"""Sessions of agents: what they ask becomes tokens that extend each other, and what was sampled becomes trajectories."""
