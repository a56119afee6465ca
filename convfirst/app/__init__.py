"""What a person starts, as functions of a configuration."""
