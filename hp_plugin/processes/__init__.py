"""How the processes of a run end: with whoever started them, on a signal, and with one line that says why."""
