package bench

import "context"

// Scenario is one thing that can be measured, and a command of overplane-bench.
type Scenario struct {
	Name  string // of the command, and of its series
	Short string
	Long  string
	// InMemory: it needs neither root nor the programs.
	InMemory bool
	// All and Quick: it is part of `all`, and of `quick`.
	All, Quick bool
	Run        func(context.Context, *Runner) error
}

// scenarios in the order in which `all` runs them. A new one is a file of this package with a variable like these, and a line here.
var scenarios = []*Scenario{
	&tcpScenario,
	&ppsScenario,
	&udpScenario,
	&rungsScenario,
	&idleScenario,
	&pipelineScenario,

	&churnScenario,
	&natScenario,
}
