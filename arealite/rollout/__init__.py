"""The rollout head: a client over the inference servers, episodes in flight, staleness, the ledger. Used by scripts."""
