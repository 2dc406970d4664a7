"""What several test files share: ranks, servers, runs, small models and reference results."""
