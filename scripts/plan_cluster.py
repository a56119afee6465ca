"""Plans ImageNet training on many GPUs on paper, from the measurements under results/ (convfirst.app.plan_cluster).

python scripts/plan_cluster.py              write the plan into README, between its markers
python scripts/plan_cluster.py --check      fail if README holds another plan
python scripts/plan_cluster.py --measure    time the data sources on one core of this machine: results/loader.json
"""

import argparse

from convfirst.app.plan_cluster import measure, write_plan


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--measure", action="store_true")
    arguments = parser.parse_args()
    if arguments.measure:
        measure()
    else:
        write_plan(arguments.check)


if __name__ == "__main__":
    main()
