"""Networks: teachers, students, adapters (LoRA), motion modules and critics, loaded, made and checked."""
