"""How an agent acts: policies, the episode loop, trajectories, the ledger and the queue. Imports `envs` alone."""
