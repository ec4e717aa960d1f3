"""Knative's Broker in small, for one machine: takes events, filters them, delivers them at least once.

    main      the process: the broker's port, and the inbox watcher
    triggers  which subscriber receives which event
    delivery  one event to one subscriber: retries, replies, dead letters
    fault_injection  duplicates, losses and reordering on purpose
    watcher   files in the inbox become events of storage

In memory, like Knative's in-memory channel: events in flight when the process dies are lost, and the gateway repeats
their doorbells.
"""
