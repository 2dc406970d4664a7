"""Starting and watching the processes of a run: allocation grammar, process plan, local launcher. Used by cli.py."""
