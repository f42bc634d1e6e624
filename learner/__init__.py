"""How a student learns: examples, masks, objectives, DeepSpeed, checkpoints."""
