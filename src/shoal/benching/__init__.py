"""How fast it is, and how fast it could be: costs of the parts, the ceilings that follow from them, and a run measured against its ceiling."""
