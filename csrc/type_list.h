// Lists of types. The instances of a kernel template are such a list: each is a type that holds their arguments.
#pragma once

namespace rrt {

template <class... Types>
struct TypeList {};

// Calls f(Type{}) for each type of the list.
template <class F, class... Types>
constexpr void for_each_type(TypeList<Types...>, F f) {
  (f(Types{}), ...);
}

}  // namespace rrt
