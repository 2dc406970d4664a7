"""Where tasks and small models come from: files, hubs, reasoning_gym; used by trainer scripts and the CLI."""
