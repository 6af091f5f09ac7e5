"""Sources of batches: images, captions, clips, prompts and rollouts, encoded once and kept on disk."""
