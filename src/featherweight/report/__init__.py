"""What a finished run shows: plots, the self-contained HTML report, the model card, terminal tables."""
