"""Recurrent networks whose every time step is a batch norm of its own: one norm module for all steps, one file per network."""
