"""Where a run happens: new ranks on this machine, in an emulated network or not, or those of an allocation."""
