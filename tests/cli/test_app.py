"""What all commands share."""

from mu2llm.cli.app import show, work_on_ray


def test_what_ray_prints_meanwhile_does_not_reach_the_result(ray_cluster, capsys):
    with work_on_ray(None):
        print("(raylet) a message of another driver's")
    show({"steps": 3}, as_json=True)
    told = capsys.readouterr()
    assert told.out == '{"steps": 3}\n'
    assert "(raylet)" in told.err
