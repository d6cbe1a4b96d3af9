package drop

import (
	"testing"

	"github.com/stretchr/testify/require"
)

func TestEveryReasonIsDescribedOnce(t *testing.T) {
	seen := make(map[string]Reason)
	for r := None; r < NumReasons; r++ {
		d := r.Description()
		require.NotEmpty(t, d, "reason %v has no description", r)
		other, twice := seen[d]
		require.False(t, twice, "reasons %v and %v have the same description", r, other)
		seen[d] = r
	}
}
