"""Two kinds of methods for a stream: those that lend statistics, and those that go down a loss."""
