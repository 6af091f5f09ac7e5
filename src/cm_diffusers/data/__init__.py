"""Sources of batches: images, captions, clips, prompts and rollouts, encoded once and kept on disk."""

from cm_diffusers.extras import require_training


require_training()
