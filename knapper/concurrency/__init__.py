"""What threads and tasks that share something need: who is next, and who may go on."""
