"""A process without torchrun's variables finds its place in those of srun and mpirun."""

import pytest

from alexnet_mp.parallel.launcher import Environment
from alexnet_mp.parallel.schedulers import PORTS, adopt, first_host, translated

SRUN = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_NTASKS": "4",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
}
BATCH_SCRIPT = {"SLURM_JOB_ID": "4711", "SLURM_PROCID": "0", "SLURM_NTASKS": "4"}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "PMIX_NAMESPACE": "prterun-host-17@1",
}
INTEL_MPI = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
MPICH_ON_TWO_HOSTS = {
    "PMI_RANK": "1",
    "PMI_SIZE": "2",
    "MPI_LOCALRANKID": "0",
    "MPI_LOCALNRANKS": "1",
}


def place(variables: dict[str, str]) -> tuple[int, int, int, int]:
    found = Environment.read(variables)
    assert found.knows_host
    return found.rank, found.world_size, found.local_rank, found.local_world_size


def test_a_task_of_srun_is_a_rank_and_meets_on_the_first_host_of_the_step() -> None:
    assert place(SRUN) == (3, 4, 1, 2)
    environment = Environment.read(SRUN)
    assert environment.address == "gpu07" and environment.port in PORTS


def test_a_step_on_hosts_of_different_sizes_counts_the_tasks_of_each() -> None:
    uneven = SRUN | {"SLURM_STEP_TASKS_PER_NODE": "1,3", "SLURM_LOCALID": "2"}
    assert place(uneven) == (3, 4, 2, 3)


def test_without_the_list_of_tasks_the_ranks_find_out_who_shares_a_host() -> None:
    variables = {name: SRUN[name] for name in SRUN if name != "SLURM_STEP_TASKS_PER_NODE"}
    assert not Environment.read(variables).knows_host


def test_every_task_of_a_step_derives_the_same_port_and_another_job_another_one() -> None:
    first = Environment.read(SRUN).port
    assert Environment.read(SRUN | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0"}).port == first
    ports = {Environment.read(SRUN | {"SLURM_JOB_ID": str(job)}).port for job in range(50)}
    ports |= {Environment.read(SRUN | {"SLURM_STEP_ID": str(step)}).port for step in range(50)}
    assert len(ports) > 90


def test_an_address_that_the_user_sets_is_taken() -> None:
    environment = Environment.read(SRUN | {"MASTER_ADDR": "10.0.0.5", "MASTER_PORT": "4000"})
    assert (environment.address, environment.port) == ("10.0.0.5", 4000)


@pytest.mark.parametrize("variables", [{}, BATCH_SCRIPT, SRUN | {"SLURM_STEP_NUM_TASKS": "1"}])
def test_a_batch_script_and_a_step_of_one_task_are_one_rank(variables: dict[str, str]) -> None:
    assert Environment.read(variables) == Environment()


@pytest.mark.parametrize("variables", [OPEN_MPI, INTEL_MPI])
def test_a_process_of_mpirun_on_one_host_meets_there(variables: dict[str, str]) -> None:
    assert place(variables) == (1, 2, 1, 2)
    assert Environment.read(variables).address == "127.0.0.1"


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        (OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, "mpirun -x MASTER_ADDR=HOST"),
        (MPICH_ON_TWO_HOSTS, "mpirun -genv MASTER_ADDR HOST"),
        (SRUN | {"SLURM_DISTRIBUTION": "arbitrary"}, "MASTER_ADDR=HOST srun"),
        (SRUN | {"SLURM_STEP_NODELIST": ""}, "MASTER_ADDR=HOST srun"),
    ],
)
def test_where_the_host_of_rank_0_is_unknown_the_variable_is_named(
    variables: dict[str, str], words: str
) -> None:
    adopted = dict(variables)
    adopt(adopted)
    for environment in (variables, adopted):
        with pytest.raises(ValueError, match="set MASTER_ADDR to the name of that host") as caught:
            Environment.read(environment)
        assert words in str(caught.value) and "\n" not in str(caught.value)
    assert Environment.read(variables | {"MASTER_ADDR": "a"}).address == "a"


def test_mpirun_inside_a_slurm_job_is_believed_and_not_its_helpers_step() -> None:
    helpers = SRUN | {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_LOCALID": "0"}
    assert place(helpers | OPEN_MPI)[:2] == (1, 2)
    assert place(helpers | INTEL_MPI)[:2] == (1, 2)


def test_srun_with_pmi_keeps_slurms_address() -> None:
    assert Environment.read(SRUN | {"PMI_RANK": "3", "PMI_SIZE": "4"}).address == "gpu07"


def test_torchrun_inside_srun_is_believed() -> None:
    torchruns = {"RANK": "5", "WORLD_SIZE": "8", "MASTER_ADDR": "h", "MASTER_PORT": "1"}
    assert translated(SRUN | torchruns) == SRUN | torchruns


def test_adopting_twice_changes_nothing_more() -> None:
    variables = dict(SRUN)
    adopt(variables)
    once = dict(variables)
    adopt(variables)
    assert variables == once and variables["RANK"] == "3"


@pytest.mark.parametrize(
    ("hosts", "first"),
    [
        ("gpu07", "gpu07"),
        ("gpu[07-08]", "gpu07"),
        ("gpu[3,5-9],login", "gpu3"),
        ("a-1,b[1-2]", "a-1"),
        ("rack[0-1]n[2-3].site", "rack0n2.site"),
        ("", ""),
    ],
)
def test_the_first_host_of_slurms_list(hosts: str, first: str) -> None:
    assert first_host(hosts) == first
