"""What a script wires, per kind of student: text to image, images without prompts, video, rewards."""
