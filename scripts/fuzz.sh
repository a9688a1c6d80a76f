#!/usr/bin/env bash
# Runs every fuzz test, one after the other, each for FUZZTIME (20s): what a decoder makes of input that nobody wrote down.
#
#   scripts/fuzz.sh [REGEXP]    only those whose names match
#
# What one finds is kept by go test below testdata/fuzz of its package, and runs with every other test from then on.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/lib.sh

time=${FUZZTIME:-20s}
wanted=${1:-.}
found=0
failed=()
while read -r file; do
	package=./$(dirname "$file")
	while read -r name; do
		[[ $name =~ $wanted ]] || continue
		found=$((found + 1))
		echo "== $package $name"
		go test -run '^$' -fuzz "^$name\$" -fuzztime "$time" -fuzzminimizetime 1s -timeout 30m "$package" || failed+=("$package $name")
	done < <(sed -n 's/^func \(Fuzz[A-Za-z0-9_]*\)(f \*testing\.F).*/\1/p' "$file")
done < <(git ls-files '*_test.go' | xargs grep -l '^func Fuzz')
if ((found == 0)); then
	echo "no fuzz test matches $wanted" >&2
	exit 1
fi
echo "$found fuzz tests, each for $time: ${#failed[@]} failed"
if ((${#failed[@]})); then
	printf '  %s\n' "${failed[@]}"
	exit 1
fi
