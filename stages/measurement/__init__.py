"""What this machine tells: how long operators take, how much memory the process holds, how much energy is drawn."""
