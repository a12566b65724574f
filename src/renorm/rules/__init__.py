"""The doctor's rules, one per file: facts in, findings out. Drop in a file with a `Rule` and the doctor runs it."""
