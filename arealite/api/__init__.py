"""The contracts between the parts; imports nothing heavy, is imported by everything."""
