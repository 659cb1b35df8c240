"""The commands, one file each; `hiermoe.commands.cli` finds them."""
