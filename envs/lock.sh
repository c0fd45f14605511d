#!/usr/bin/env bash
# Writes the locks anew: envs/<framework>.<accelerator>.in -> .txt, and the transitive pins of the
# workflow's own environment in pyproject.toml. Run it after changing a .in file or a dependency;
# with --upgrade everything that is not pinned by hand moves to its newest version.
set -euo pipefail
cd "$(dirname "$0")"

compile() { # --no-config: the pins in pyproject.toml are the workflow's, not the frameworks'
    uv pip compile --no-config --quiet --no-header --no-annotate --generate-hashes \
        --no-emit-index-url --no-emit-find-links \
        --python-version 3.11 --python-platform x86_64-manylinux_2_28 "$@"
}

for source in *.*.in; do
    echo "$source"
    # PyTorch's CPU build, 2.13.0+cpu, is not on the public index: it comes from UV_FIND_LINKS where
    # that is set, else from PyTorch's own index. No other lock may see that folder.
    folder="" backend=()
    if [ "$source" = pytorch.cpu.in ]; then
        folder=${UV_FIND_LINKS:-}
        [ -n "$folder" ] || backend=(--torch-backend=cpu)
    fi
    UV_FIND_LINKS=$folder compile "${backend[@]}" "$@" "$source" --output-file "${source%.in}.txt"
done

# A lock that said 2.13.0+cpu would not install on a Mac, whose CPU build is 2.13.0: both are allowed.
version=$(sed -n 's/^torch==\(.*\)+cpu.*/\1/p' pytorch.cpu.txt)
public=$(echo "torch==$version" | UV_FIND_LINKS="" compile --no-deps - | sed -n '/sha256/{s/ *\\*$/ \\/;p}')
sed -i -e "/^torch==/r /dev/stdin" -e 's/^\(torch==.*\)+cpu/\1/' pytorch.cpu.txt <<<"$public"

echo pyproject.toml
pins() { # of the workflow's environment: NAME==VERSION lines
    uv export --project .. --quiet --no-hashes --no-annotate --no-header --no-emit-project "$@" |
        sed -n 's/^\([^ ;]*==[^ ;]*\).*/\1/p'
}
sed -i '/^constraint-dependencies = \[/,/^\]/{/==/d}' ../pyproject.toml
pins "$@" | sed 's/.*/    "&",/' >constraints.tmp
sed -i -e '/^constraint-dependencies = \[/r constraints.tmp' ../pyproject.toml
rm constraints.tmp

conda() { # standard input: NAME==VERSION lines
    echo "$1.yaml" >&2
    {
        echo "# For \`snakemake --sdm conda\`: what $2 lists, as envs/lock.sh wrote it."
        printf '%s\n' "channels:" "  - conda-forge" "  - nodefaults" "dependencies:" "  - python =3.11" "  - pip" "  - pip:"
        sed 's/^/      - /'
    } >"$1.yaml"
}
# Snakemake copies these files elsewhere, so they cannot point at the locks with -r.
for lock in *.cpu.txt; do
    sed -n 's/^\([^ ]*==[^ ]*\).*/\1/p' "$lock" | conda "${lock%.cpu.txt}" "$lock"
done
pins --no-dev | conda workflow pyproject.toml
