"""What the commands that start real SGLang servers share: demo, benches, profile, evaluation."""
