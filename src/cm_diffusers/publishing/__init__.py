"""What leaves a run: pipelines, LoRA files, records, model cards and uploads to the Hub."""
