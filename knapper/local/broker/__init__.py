"""Knative's Broker in small, for one machine: takes events, filters them, delivers them at least once.

    main      the process: the broker's port, and the inbox watcher
    triggers  who hears what
    delivery  one event to one subscriber: retries, replies, dead letters
    fault_injection  duplicates, losses and reordering on purpose
    watcher   files in the inbox become events of storage

In memory, as Knative's own in-memory channel: what is on its way when the process dies is lost, and rung again by the
gateway's tick.
"""
