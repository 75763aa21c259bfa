"""Training that costs what the plan says."""
