"""Model folders and the architectures in them: what trainer and servers find out about a model before they load it."""
