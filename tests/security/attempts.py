"""Ways out of a process. Each returns True where it works: the tests run it outside the sandbox first, and then in it.

Only the functions' text goes into the sandbox, so each imports what it needs. `world`: see test_escapes.py.
"""

from collections.abc import Callable
from typing import Any

World = dict[str, Any]

# Network


def connects_by_tcp(world: World) -> bool:
    import socket

    with socket.create_connection(("127.0.0.1", world["port"]), timeout=5) as connection:
        return connection.send(b"x") == 1


def fetches_a_page(world: World) -> bool:
    import urllib.request

    with urllib.request.urlopen(f"http://127.0.0.1:{world['port']}/", timeout=5) as page:
        return bool(page.status == 200)


def sends_a_datagram(world: World) -> bool:
    import socket

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        return sender.sendto(b"x", ("127.0.0.1", world["port"])) == 1


def connects_to_a_socket_in_the_file_system(world: World) -> bool:
    import socket

    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(world["unix"])
        return True


def listens_for_others(world: World) -> bool:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        return bool(server.getsockname()[1])


def makes_a_socket_without_python(world: World) -> bool:
    import ctypes

    return bool(ctypes.CDLL(None).socket(2, 1, 0) >= 0)


def makes_a_pair_of_sockets(world: World) -> bool:
    import socket

    one, other = socket.socketpair()
    return one.send(b"x") == 1 and other.recv(1) == b"x"


def looks_up_a_name(world: World) -> bool:
    import socket

    return bool(socket.gethostbyname("localhost"))


# Files


def reads_a_file(world: World) -> bool:
    with open(world["canary"]) as file:
        return file.read() == "sings"


def reads_the_users_of_the_machine(world: World) -> bool:
    with open("/etc/passwd") as file:
        return "root" in file.read()


def reads_a_file_without_python(world: World) -> bool:
    import ctypes

    return bool(ctypes.CDLL(None).open(world["canary"].encode(), 0) >= 0)


def opens_a_file_by_the_newest_call(world: World) -> bool:
    import ctypes

    how = (ctypes.c_uint64 * 3)(0, 0, 0)
    call = ctypes.CDLL(None).syscall  # openat2: its flags lie in memory, where a filter cannot look
    return bool(call(437, -100, world["canary"].encode(), ctypes.byref(how), 24) >= 0)


def writes_a_file(world: World) -> bool:
    with open(world["scratch"] + "/new", "w") as file:
        return file.write("x") == 1


def appends_to_a_file(world: World) -> bool:
    with open(world["victim_file"], "a") as file:
        return file.write("x") == 1


def truncates_a_file(world: World) -> bool:
    import os

    os.truncate(world["victim_file"], 0)
    return True


def deletes_a_file(world: World) -> bool:
    import os

    os.unlink(world["victim_file"])
    return True


def renames_a_file(world: World) -> bool:
    import os

    os.rename(world["victim_file"], world["victim_file"] + ".moved")
    return True


def follows_a_symlink_of_its_own(world: World) -> bool:
    import os

    os.symlink(world["canary"], world["scratch"] + "/link")
    with open(world["scratch"] + "/link") as file:
        return file.read() == "sings"


def follows_a_symlink_that_is_there(world: World) -> bool:
    with open(world["symlink"]) as file:
        return file.read() == "sings"


def makes_a_hard_link(world: World) -> bool:
    import os

    os.link(world["canary"], world["scratch"] + "/hard")
    return True


def makes_a_directory(world: World) -> bool:
    import os

    os.mkdir(world["scratch"] + "/directory")
    return True


def changes_a_mode(world: World) -> bool:
    import os

    os.chmod(world["victim_file"], 0o777)
    return True


def makes_a_pipe_in_the_file_system(world: World) -> bool:
    import os

    os.mkfifo(world["scratch"] + "/fifo")
    return True


def lists_the_root(world: World) -> bool:
    import os

    return "etc" in os.listdir("/")


def asks_whether_a_file_exists(world: World) -> bool:
    import os.path

    return os.path.exists(world["canary"])


def makes_a_temporary_file(world: World) -> bool:
    import tempfile

    with tempfile.TemporaryFile() as file:
        return file.write(b"x") == 1


def makes_a_file_in_memory(world: World) -> bool:
    import os

    return os.memfd_create("x") >= 0


def opens_a_database_file(world: World) -> bool:
    import sqlite3

    sqlite3.connect(world["scratch"] + "/database").execute("create table t(a)")
    return True


def changes_its_directory(world: World) -> bool:
    import os

    os.chdir(world["scratch"])
    return True


def writes_into_shared_memory(world: World) -> bool:
    with open(f"/dev/shm/knapper-{world['pid']}", "w") as file:
        return file.write("x") == 1


def reads_a_device(world: World) -> bool:
    with open("/dev/urandom", "rb") as device:
        return len(device.read(1)) == 1


# /proc and the environment


def reads_the_environment(world: World) -> bool:
    import os

    return os.environ.get("CANARY") == "sings"


def reads_the_environment_in_proc(world: World) -> bool:
    with open("/proc/self/environ") as file:
        return "CANARY=sings" in file.read()


def reads_anothers_command_line(world: World) -> bool:
    with open(f"/proc/{world['pid']}/cmdline") as file:
        return bool(file.read())


def reads_anothers_environment(world: World) -> bool:
    with open(f"/proc/{world['pid']}/environ") as file:
        return bool(file.read())


def lists_its_files(world: World) -> bool:
    import os

    return bool(os.listdir("/proc/self/fd"))


def writes_its_memory_by_proc(world: World) -> bool:
    with open("/proc/self/mem", "r+b"):
        return True


# Processes, signals, threads, privileges


def forks(world: World) -> bool:
    import os

    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    return True


def runs_a_program(world: World) -> bool:
    import subprocess

    return subprocess.run(["/bin/true"]).returncode == 0


def runs_a_shell(world: World) -> bool:
    import os

    return os.system("true") == 0


def becomes_a_program(world: World) -> bool:
    import os

    os.execv("/bin/echo", ["echo", "True"])


def spawns_by_posix(world: World) -> bool:
    import os

    return os.posix_spawn("/bin/true", ["true"], {}) > 0


def starts_a_process_of_multiprocessing(world: World) -> bool:
    import multiprocessing
    import time

    process = multiprocessing.get_context("fork").Process(target=time.sleep, args=(0,))
    process.start()
    process.join()
    return process.exitcode == 0


def starts_a_thread(world: World) -> bool:
    import threading

    seen: list[int] = []
    thread = threading.Thread(target=seen.append, args=(1,))
    thread.start()
    thread.join()
    return seen == [1]


def signals_another(world: World) -> bool:
    import os
    import signal

    os.kill(world["pid"], signal.SIGCONT)
    return True


def signals_its_parent(world: World) -> bool:
    import os
    import signal

    os.kill(os.getppid(), signal.SIGCONT)
    return True


def signals_its_group(world: World) -> bool:
    import os

    os.killpg(0, 0)
    return True


def has_a_file_signal_another(world: World) -> bool:
    import fcntl

    return fcntl.fcntl(1, 8, world["pid"]) == 0  # F_SETOWN


def traces_another(world: World) -> bool:
    import ctypes

    seize = 0x4206
    return bool(ctypes.CDLL(None).ptrace(seize, world["pid"], None, None) == 0)


def reads_anothers_memory(world: World) -> bool:
    import ctypes
    import os

    here = ctypes.create_string_buffer(1)
    there = ctypes.create_string_buffer(b"x")
    local = (ctypes.c_uint64 * 2)(ctypes.addressof(here), 1)
    remote = (ctypes.c_uint64 * 2)(ctypes.addressof(there), 1)
    own = os.getpid()  # even of itself: the call must not exist
    return bool(ctypes.CDLL(None).process_vm_readv(own, ctypes.byref(local), 1, ctypes.byref(remote), 1, 0) == 1)


def opens_a_process(world: World) -> bool:
    import os

    return os.pidfd_open(world["pid"]) >= 0


def makes_a_namespace(world: World) -> bool:
    import ctypes

    return bool(ctypes.CDLL(None).unshare(0x04000000) == 0 or ctypes.CDLL(None).unshare(0x14000000) == 0)


def makes_memory_executable(world: World) -> bool:
    import mmap

    return len(mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)) == 4096


def raises_its_limits(world: World) -> bool:
    import resource

    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return True


def makes_shared_memory_of_system_v(world: World) -> bool:
    import ctypes

    return bool(ctypes.CDLL(None).shmget(0, 4096, 0o1600) >= 0)


def opens_many_files(world: World) -> bool:
    import os

    return all(os.dup(1) for _ in range(100))


def imports_what_it_did_not_name(world: World) -> bool:
    return len(__import__("wsgiref." + "validate").__path__) > 0


def loads_a_library(world: World) -> bool:
    import ctypes

    return bool(ctypes.CDLL("libpthread.so.0"))


def drops_the_filter(world: World) -> bool:
    import ctypes

    return bool(ctypes.CDLL(None).prctl(38, 1, 0, 0, 0) == 0)  # PR_SET_NO_NEW_PRIVS, as any use of prctl


ALL: dict[str, Callable[[World], bool]] = {
    name: value
    for name, value in list(globals().items())
    if callable(value) and getattr(value, "__module__", "") == __name__
}
