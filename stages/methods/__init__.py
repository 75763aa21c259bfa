"""Ways to adapt a backbone to a few-shot task, one signature for all, and their comparison on the same tasks."""
