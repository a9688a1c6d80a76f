#!/usr/bin/env bash
# Runs every fuzz test, one after the other, each for FUZZTIME (20s): what a decoder makes of input that nobody wrote down.
#
#   scripts/fuzz.sh [REGEXP]    only those whose names match
#   scripts/fuzz.sh -l          list them, and run none
#
# What one finds is kept by go test below testdata/fuzz of its package, and runs with every other test from then on.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/lib.sh

# tests prints a line for each: its package and its name. A file that git doesn't know yet counts too.
tests() {
	local file
	git ls-files --cached --others --exclude-standard '*_test.go' | while read -r file; do
		[[ -f $file ]] || continue
		sed -n "s|^func \(Fuzz[A-Za-z0-9_]*\)(f \*testing\.F).*|./$(dirname "$file") \1|p" "$file"
	done
}
if [[ ${1:-} == -l ]]; then
	tests
	exit
fi

time=${FUZZTIME:-20s}
wanted=${1:-.}
found=0
failed=()
while read -r package name; do
	[[ $name =~ $wanted ]] || continue
	found=$((found + 1))
	echo "== $package $name"
	go test -run '^$' -fuzz "^$name\$" -fuzztime "$time" -fuzzminimizetime 1s -timeout 30m "$package" </dev/null || failed+=("$package $name")
done < <(tests)
if ((found == 0)); then
	echo "no fuzz test matches $wanted" >&2
	exit 1
fi
echo "$found fuzz tests, each for $time: ${#failed[@]} failed"
if ((${#failed[@]})); then
	printf '  %s\n' "${failed[@]}"
	exit 1
fi
