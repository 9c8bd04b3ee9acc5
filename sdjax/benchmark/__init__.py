"""How fast this machine is, stage by stage, beside diffusers where that is installed."""
