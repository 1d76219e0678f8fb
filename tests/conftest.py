import pytest, torch


@pytest.fixture(autouse=True)
def seeded():
    "The same random numbers for a test wherever it runs in the order"
    torch.manual_seed(0)
