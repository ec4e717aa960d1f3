"""The store in memory, for tests and the simulation."""

from bisect import bisect_right, insort

from knapper.store import Names, check_name


class MemoryStore:
    def __init__(self) -> None:
        self._objects: dict[str, bytes] = {}
        self._names: Names = []  # sorted

    async def put_if_absent(self, name: str, data: bytes) -> bool:
        if check_name(name) in self._objects:
            return False
        self._objects[name] = bytes(data)
        insort(self._names, name)
        return True

    async def get(self, name: str) -> bytes | None:
        return self._objects.get(check_name(name))

    async def list(self, prefix: str, start_after: str = "", limit: int = 0) -> Names:
        names: Names = []
        for at in range(bisect_right(self._names, max(start_after, prefix[:-1])), len(self._names)):
            name = self._names[at]
            if not name.startswith(prefix):
                if name > prefix:
                    break
                continue
            if name > start_after:
                names.append(name)
            if limit and len(names) == limit:
                break
        return names

    async def delete(self, name: str) -> None:
        if self._objects.pop(check_name(name), None) is not None:
            del self._names[bisect_right(self._names, name) - 1]
