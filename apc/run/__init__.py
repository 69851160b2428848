"""One run, stage by stage: trainer, checkpoints, tracking, folder."""
