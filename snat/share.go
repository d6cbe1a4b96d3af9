package snat

// shareFactor: beyond its guarantee a pod may hold shareFactor times what nobody holds or is promised. With 2, a pod alone gets two
// thirds of everything, and always leaves newcomers something to grow into (dynamic thresholds: Choudhury and Hahne, 1998).
const shareFactor = 2

// share divides a fixed number of things fairly among pods. A pod may have up to
//
//	max(guarantee, shareFactor * (free - guarantees of attached pods that they have not used up))
//
// Nothing that is held is ever taken away, so that a pod over its limit just gets no more.
type share struct {
	capacity  int
	used      int
	guarantee int
	unmet     int // sum over attached pods of what is missing to their guarantee
}

// attach promises the guarantee to a pod that holds held.
func (s *share) attach(held uint32) { s.unmet += max(0, s.guarantee-int(held)) }

// detach takes the promise back.
func (s *share) detach(held uint32) { s.unmet -= max(0, s.guarantee-int(held)) }

// limit is how many things a pod may have in all.
func (s *share) limit() int {
	return min(s.capacity, max(s.guarantee, shareFactor*(s.capacity-s.used-s.unmet)))
}

// allows reports whether a pod that holds held may have one more. Also a guarantee ends where there is nothing left.
func (s *share) allows(held uint32) bool {
	return s.used < s.capacity && (int(held) < s.guarantee || int(held) < shareFactor*(s.capacity-s.used-s.unmet))
}

// add gives an attached pod one more.
func (s *share) add(held *uint32) {
	if int(*held) < s.guarantee {
		s.unmet--
	}
	*held++
	s.used++
}

// sub takes one back.
func (s *share) sub(held *uint32) {
	*held--
	s.used--
	if int(*held) < s.guarantee {
		s.unmet++
	}
}
