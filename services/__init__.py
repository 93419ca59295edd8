"""The programs of redmesh: proxy, controller, agent, simengine and the command line."""
