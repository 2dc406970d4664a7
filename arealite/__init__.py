"""AReaLite: reinforcement learning from verifiable rewards, one script and one YAML from a laptop to a cluster.

Nothing is imported here, so that `import arealite.<part>` costs what that part costs.
"""

__version__ = "0.1.0"
