// Package policy decides how strong the wall around a workload must be. A policy is a list of rules that a person wrote;
// Decide is a pure function of them and of its argument. What it cannot decide it refuses.
//
// docs/policy.md is the reference of the language.
package policy
