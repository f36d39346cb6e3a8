"""Every case of ../shared/faults, inputs that went wrong for users, on the commands of today."""
